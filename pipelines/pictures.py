"""Pictures that commands write besides their results: checked before the work, written after it."""

from pathlib import Path

from PIL import Image

from prophy.errors import ProPhyError


def check_picture(path: Path) -> None:
    """Whether a picture can be written there; makes its folder.

    Raises:
        ProPhyError: the folder cannot be made or written to, or no format of pictures has this ending.
    """
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ProPhyError(f"cannot write the picture {path}: no format has this ending; take .png")
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise ProPhyError(f"cannot write the picture {path}: {error.strerror}") from None


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a picture to a place that was checked before.

    Raises:
        ProPhyError: there is no room left for it, or the format cannot hold it.
    """
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise ProPhyError(f"cannot write the picture {path}: {error}") from None
