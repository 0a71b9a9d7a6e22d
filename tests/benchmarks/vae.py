"""What the embedded VAE keeps of a clip: peak signal-to-noise ratio on combinations that were never trained.

python tests/benchmarks/vae.py [NUM_CLIPS]
"""

import argparse

from diffusers import AutoencoderKLWan
from rich import print_json

from prophy.pretraining.recipe import held_out_clips
from prophy.pretraining.vae import reconstruct, reconstruction_quality
from prophy.tiny.pipeline import pipeline_folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("num_clips", nargs="?", type=int, default=60)
    clips = held_out_clips(parser.parse_args().num_clips)
    vae = AutoencoderKLWan.from_pretrained(pipeline_folder() / "vae").eval()
    reconstructions = list(reconstruct(vae, (clip.frames for clip in clips)))
    print_json(data=reconstruction_quality(clips, reconstructions))


if __name__ == "__main__":
    main()
