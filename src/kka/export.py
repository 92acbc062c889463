"""A detector as one file that needs neither this program nor its settings: torch.export or ONNX.

Everything is inside the graph: Pillow's resizing, normalisation, network, distance and threshold. What is
outside is only what turns a file into RGB pixels. A file is kept only if it scores as the detector does.
"""

import io
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from kka.datasets.images import read_image, test_view
from kka.errors import UserError
from kka.files import write_bytes
from kka.seeds import generator
from kka.trained import Trained, open_model

BITS = 22  # of the fixed-point weights with which Pillow resizes
TOLERANCE = 1e-5  # of the largest score
N_REAL, REAL_SIDE = 4, 512  # real images of an export's test, and the largest side to which they are shrunk

Scoring = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(N, 3, H, W) uint8 -> (N,) scores and (N,) bool, whether anomalous"""


class Exported(nn.Module):
    """A detector from pixels to decisions.

    (N, 3, H, W) uint8 RGB of any size -> (N,) float32 scores, (N,) bool: False strictly below the threshold.
    """

    threshold: Tensor

    def __init__(self, scorer: nn.Module, size: int, threshold: float, bgr: bool) -> None:
        super().__init__()
        self.scorer, self.size, self.bgr = scorer, size, bgr
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float64))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        resized = resize(images, self.size)
        scores = self.scorer(resized.flip(1) if self.bgr else resized)
        return scores, ~(scores.double() < self.threshold)


def resize(images: Tensor, size: int) -> Tensor:
    """Pillow's bilinear resize to a square, bit for bit. (N, 3, H, W) uint8 -> (N, 3, size, size) uint8.

    Pillow resizes one axis after the other and rounds in between, so that the order matters; it takes the
    rows first where the picture loses more than twice as many rows as columns.
    """
    height, width = images.shape[2], images.shape[3]

    def columns_first(x: Tensor) -> Tensor:
        return resize_axis(resize_axis(x.double(), size, 3), size, 2).to(torch.uint8)

    def rows_first(x: Tensor) -> Tensor:
        return resize_axis(resize_axis(x.double(), size, 2), size, 3).to(torch.uint8)

    def other_size(x: Tensor) -> Tensor:
        return torch.cond((height > size) & (height + size > 2 * width), rows_first, columns_first, (x,))

    resized = torch.cond((height == size) & (width == size), torch.clone, other_size, (images,))
    return resized.view(images.shape[0], 3, size, size)  # what a graph with branches cannot know


def resize_axis(pixels: Tensor, size: int, axis: int) -> Tensor:
    """Whole numbers in [0, 255] as float64, which holds every product here exactly; axis 2 or 3 of four."""
    weights = pillow_weights(pixels.shape[axis], size)
    sums = pixels @ weights.T if axis == 3 else weights @ pixels
    return ((sums + 2 ** (BITS - 1)) / 2**BITS).floor().clamp(0, 255)


def pillow_weights(n_in: int, n_out: int) -> Tensor:
    """Fixed-point weights of Pillow's bilinear filter, which widens when it shrinks. -> (n_out, n_in)."""
    scale = torch.full((), n_in, dtype=torch.float64) / n_out
    support = scale.clamp(min=1)
    centres = (torch.arange(n_out, dtype=torch.float64)[:, None] + 0.5) * scale
    sources = torch.arange(n_in, dtype=torch.float64)
    first, end = (centres - support + 0.5).floor(), (centres + support + 0.5).floor()
    triangle = (1 - ((sources - centres + 0.5) * (1 / support)).abs()).clamp(min=0)
    weights = triangle * ((sources >= first) & (sources < end))
    return (weights / weights.sum(1, keepdim=True) * 2**BITS + 0.5).floor()


def export(run: Path, file: Path, threshold: float | None = None, images: Sequence[Path] = ()) -> str:
    """Write a run's detector to FILE.pt2 or FILE.onnx and say what it was tested on.

    It is read again and must score as the detector does, on random images of several sizes and on some of
    `images`. Raises UserError if it does not, or if the extra is missing; then nothing is written.
    """
    trained = open_model(run, torch.device("cpu"))
    threshold = trained.threshold if threshold is None else threshold
    to_file, from_file = FORMATS[file.suffix.lower()]
    if to_file is to_onnx:
        import_onnxruntime()  # before the work
    pictures = [*random_pictures(trained.detector.image_size), *real_pictures(images)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about itself
        data = to_file(trace(trained, threshold))
        error = largest_error(from_file(data), trained, threshold, pictures)
    write_bytes(file, data)
    return (
        f"exported {trained.name} to {file}, {len(data) / 2**20:.1f} MiB: scores of {len(pictures)} images "
        f"of other sizes differ by {error:.1e} of the largest"
    )


def trace(trained: Trained, threshold: float) -> ExportedProgram:
    """The detector as a graph for any number of images of any size."""
    size = trained.detector.image_size
    scorer = trained.detector.scorer().requires_grad_(False)
    module = Exported(scorer, size, threshold, trained.bgr).eval()
    example = torch.zeros(2, 3, size + 5, size + 3, dtype=torch.uint8)
    any_size = {0: Dim("batch", min=1), 2: Dim("height", min=1), 3: Dim("width", min=1)}
    return torch.export.export(module, (example,), dynamic_shapes=(any_size,))


def largest_error(
    exported: Scoring, trained: Trained, threshold: float, pictures: Sequence[Image.Image]
) -> float:
    """The largest difference between the scores of both, over the largest score.

    Raises UserError if it is above TOLERANCE, or if a decision differs that is not within it.
    """
    size = trained.detector.image_size
    views = torch.stack([test_view(picture, size) for picture in pictures])
    expected = trained.detector.score(views.flip(1) if trained.bgr else views).double()
    found = [exported(to_pixels([picture])) for picture in pictures]
    found.append(exported(views[:3]))  # several at a time
    expected = torch.cat([expected, expected[:3]])
    scores, decisions = (torch.cat(parts) for parts in zip(*found, strict=True))
    scale = expected.abs().max().clamp(min=1e-12)
    error = float((scores.double() - expected).abs().max() / scale)
    close = (expected - threshold).abs() <= TOLERANCE * scale
    if not error <= TOLERANCE or not ((decisions == (expected >= threshold)) | close).all():
        raise UserError(
            f"the exported {trained.name} scores differently, by {error:.1e} of the largest score where "
            f"{TOLERANCE:.0e} is allowed; it was not written"
        )
    return error


def random_pictures(size: int) -> list[Image.Image]:
    """Coloured noise of the detector's size, larger in each direction, smaller, and of one pixel."""
    shapes = ((size, size), (2 * size + 3, size + 1), (size + 7, 3 * size), (size // 2, 5), (1, 1))
    stream = generator(0, "export")
    noise = [torch.randint(256, (*shape, 3), dtype=torch.uint8, generator=stream) for shape in shapes]
    return [Image.fromarray(pixels.numpy()) for pixels in noise]


def real_pictures(paths: Sequence[Path]) -> list[Image.Image]:
    """The first images that can be read, shrunk."""
    pictures: list[Image.Image] = []
    for path in paths:
        try:
            picture = read_image(path)
        except Exception:  # it was named when it was scored
            continue
        picture.thumbnail((REAL_SIDE, REAL_SIDE))
        pictures.append(picture)
        if len(pictures) == N_REAL:
            break
    return pictures


def to_pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size -> (N, 3, H, W) uint8."""
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])


def to_pt2(program: ExportedProgram) -> bytes:
    """The bytes of a .pt2 file."""
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def from_pt2(data: bytes) -> Scoring:
    """What a .pt2 file does."""
    return torch.export.load(io.BytesIO(data)).module()


def to_onnx(program: ExportedProgram) -> bytes:
    """The bytes of an .onnx file."""
    for name in ("onnxscript", "onnx_ir"):  # they tell of every node that they cannot fold
        logging.getLogger(name).setLevel(logging.WARNING)
    names = ["score", "anomalous"]
    made = torch.onnx.export(program, dynamo=True, input_names=["images"], output_names=names, verbose=False)
    assert made is not None
    return made.model_proto.SerializeToString()


def from_onnx(data: bytes) -> Scoring:
    """What an .onnx file does in ONNX Runtime, on the CPU."""
    session = import_onnxruntime().InferenceSession(data, providers=["CPUExecutionProvider"])

    def score(images: Tensor) -> tuple[Tensor, Tensor]:
        scores, decisions = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(scores), torch.from_numpy(decisions)

    return score


def import_onnxruntime() -> Any:
    """onnxruntime, if all of the extra is there."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f".onnx files need {error.name}; install it with pip install -e '.[onnx]', or write a .pt2"
        ) from None
    return onnxruntime


FORMATS: dict[str, tuple[Callable[[ExportedProgram], bytes], Callable[[bytes], Scoring]]] = {
    ".pt2": (to_pt2, from_pt2),
    ".onnx": (to_onnx, from_onnx),
}
