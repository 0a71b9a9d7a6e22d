"""What VAEs take, against counts of whole clips that were made once, tensor by tensor."""

import pytest

from prophy.backbones.families import FAMILIES
from prophy.backbones.memory import vae_cost

COGVIDEOX = FAMILIES["cogvideox"]
VAE = COGVIDEOX.published["zai-org/CogVideoX-5b"].vae


def test_a_frame_as_large_as_the_vae_was_made_for_is_taken_whole() -> None:
    cost = vae_cost(COGVIDEOX, VAE, (49, 480, 720), 4)
    print(f"49x480x720 in float32: encode {cost.encode / 1e9:.1f} GB, decode {cost.decode / 1e9:.1f} GB")
    assert cost.encode == pytest.approx(13.4e9, rel=0.02)
    assert cost.encode_flops == pytest.approx(149e12, rel=0.02)
    half = vae_cost(COGVIDEOX, VAE, (49, 480, 720), 2)
    assert half.encode == pytest.approx(cost.encode / 2, rel=1e-6)


def test_a_larger_one_in_tiles() -> None:
    """Whole, 81 frames of 768x1360 take 24 GB to encode and 48 to decode, and 741 TFLOP to encode."""
    cost = vae_cost(COGVIDEOX, VAE, (81, 768, 1360), 2)
    print(f"81x768x1360 in bfloat16: encode {cost.encode / 1e9:.1f} GB, decode {cost.decode / 1e9:.1f} GB")
    assert cost.encode < 10e9 and cost.decode < 20e9
    assert 741e12 < cost.encode_flops < 1.5 * 741e12
