"use strict";
const STEP = 60; // cards that are made at once
const find = (id) => document.getElementById(id);

function make(name, className, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

function setUpScheme() {
  const button = find("scheme"), root = document.documentElement;
  let dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const show = () => { button.textContent = dark ? "Light scheme" : "Dark scheme"; };
  button.addEventListener("click", () => { dark = !dark; root.dataset.scheme = dark ? "dark" : "light"; show(); });
  button.hidden = false;
  show();
}

function picture(item) {
  if (!item.image) return make("span", "picture", "no file");
  const node = make("img", "picture");
  node.alt = item.caption;
  node.decoding = "async";
  node.src = item.image;
  return node;
}

function card(item, open) {
  const entry = make("li"), button = make("button", item.status), words = make("span", "words");
  const tag = make("span", "tag");
  tag.append(make("b", "", item.status), item.round ? ` · ${item.round}` : "");
  words.append(make("span", "caption", item.caption || "without a caption"), tag);
  button.type = "button";
  button.append(picture(item), words);
  button.addEventListener("click", open);
  entry.append(button);
  return entry;
}

function setUpGallery() {
  const items = JSON.parse(find("items").textContent).map(
    ([caption, round, status, score, fate, image]) => ({ caption, round, status, score, fate, image, text: caption.toLowerCase() }));
  const list = find("cards"), more = find("more"), dialog = find("detail");
  // Tells anew after each step whether the end is still near.
  const observer = new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting)) addCards();
  }, { rootMargin: "800px" });
  let shown = items, made = 0, current = 0;

  function addCards() {
    const part = document.createDocumentFragment(), end = Math.min(made + STEP, shown.length);
    for (; made < end; made += 1) {
      const place = made;
      part.append(card(shown[place], () => { open(place); }));
    }
    list.append(part);
    more.hidden = made === shown.length;
    observer.disconnect();
    if (!more.hidden) observer.observe(more);
  }

  function filter() {
    const words = find("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const round = find("round").value, status = find("status").value;
    shown = items.filter((item) => (!round || item.round === round) && (!status || item.status === status)
      && words.every((word) => item.text.includes(word)));
    list.replaceChildren();
    made = 0;
    addCards();
    find("count").textContent = `${shown.length.toLocaleString("en")} of ${items.length.toLocaleString("en")} images`;
  }

  function open(place) {
    const item = shown[place], facts = find("known");
    current = place;
    find("large").replaceChildren(picture(item));
    find("words").textContent = item.caption || "without a caption";
    facts.replaceChildren();
    const known = { status: item.status, from: item.round, score: item.score === null ? "" : String(item.score), set: item.fate };
    for (const [name, value] of Object.entries(known)) {
      if (value) facts.append(make("dt", "", name), make("dd", name === "status" ? item.status : "", value));
    }
    find("previous").disabled = place === 0;
    find("next").disabled = place === shown.length - 1;
    if (!dialog.open) dialog.showModal();
  }

  function step(by) {
    if (dialog.open && shown[current + by]) open(current + by);
  }

  find("previous").addEventListener("click", () => { step(-1); });
  find("next").addEventListener("click", () => { step(1); });
  find("close").addEventListener("click", () => { dialog.close(); });
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  find("filters").addEventListener("submit", (event) => { event.preventDefault(); });
  for (const id of ["search", "round", "status"]) find(id).addEventListener("input", filter);
  more.addEventListener("click", () => {
    const first = made;
    addCards();
    list.children[first].firstChild.focus();
  });
  filter();
}

setUpScheme();
if (find("items")) setUpGallery();
