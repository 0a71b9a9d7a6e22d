"""What the embedded VAE keeps of a clip: peak signal-to-noise ratio on combinations that were never trained.

python tests/benchmarks/vae.py [NUM_CLIPS]
"""

import sys

from diffusers import AutoencoderKLWan
from rich import print_json

from prophy.pretraining.recipe import held_out_clips
from prophy.pretraining.vae import reconstruct, reconstruction_quality
from prophy.tiny.pipeline import pipeline_folder


def main() -> None:
    clips = held_out_clips(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
    vae = AutoencoderKLWan.from_pretrained(pipeline_folder() / "vae").eval()
    reconstructions = list(reconstruct(vae, (clip.frames for clip in clips)))
    print_json(data=reconstruction_quality(clips, reconstructions))


if __name__ == "__main__":
    main()
