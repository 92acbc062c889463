"""`make demo`: Algorithm 1 on drawn flowers, two rounds, in minutes and without network, GPU or data.

LLM and text-to-image model are tiny ones that this project has trained itself (see src/kka/garden_models),
stand-ins for GLM-4 and Stable Diffusion. It is src/iterate.py with the flags below; further ones go behind
`python src/demo.py`.
"""

import shlex
import sys
import time

import iterate
from kka.errors import run_script
from kka.stand_ins import GARDEN_LOOP

FLAGS = {"dataset_name": "garden", "name": "demo", "mode": "add", "rounds": 2, **GARDEN_LOOP}


def main() -> None:
    """Run the loop; a second call finds it finished."""
    began = time.monotonic()
    words = [str(word) for name, value in FLAGS.items() for word in (f"--{name}", value)]
    print(f"the same as: {shlex.join(['python', 'src/iterate.py', *words, *sys.argv[1:]])}", flush=True)
    sys.argv[1:1] = words
    iterate.main()
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    run_script(main)
