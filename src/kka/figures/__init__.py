"""The paper's figures and a few more: plain data in, a PNG and a PDF out."""
