"""Pictures of the documentation, made anew: TensorBoard in a browser, and the curves of the demo.

    python benchmarks/screenshots.py [RUNS]

RUNS is a folder in the repository for the demo and two shorter runs beside it, trained unless they
are there. Needs chromium on PATH. Look at the pictures before they are committed.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
SHORT = ["--data.num_rollouts", "20"]
RUNS = {  # options beside configs/arithmetic.yaml
    "demo": [],
    "small-groups": [*SHORT, "--model.sampler.group_size", "4", "--data.prompts_per_rollout", "32"],
    "wide-clip": [*SHORT, "--model.objective.clip_low", "4e-3"],
}
VIEWS = {  # what is looked at, in which tab, and the size of the window
    "tensorboard_first_screen": ("demo", "timeseries", (1900, 1150)),
    "tensorboard_samples": ("demo", "text&tagFilter=samples", (1500, 720)),
    "tensorboard_custom_scalars": ("demo", "custom_scalars", (1700, 1000)),
    "tensorboard_hparams": (".", "hparams", (1900, 480)),
}
QUIET = [f"--{option}" for option in ("headless", "no-sandbox", "no-first-run", "hide-scrollbars")]
QUIET += [f"--disable-{part}" for part in ("gpu", "quic", "background-networking", "sync")]
QUIET += ["--disable-component-update"]


def train(runs: Path) -> None:
    """Train what is not there."""
    for name, options in RUNS.items():
        folder = runs / name
        if not (ROOT / folder / "export").is_dir():
            command = [sys.executable, "train.py", "fit", "--config", "configs/arithmetic.yaml"]
            command += ["--trainer.default_root_dir", str(folder), *options]
            subprocess.run(command, cwd=ROOT, check=True)


def shoot(logs: Path, tab: str, size: tuple[int, int], file: Path) -> None:
    """A picture of a tab of TensorBoard, as a browser without a card draws it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}/"
        for _ in range(60):
            try:
                urllib.request.urlopen(f"{address}data/runs").read()
                break
            except OSError:
                time.sleep(0.5)
        time.sleep(3)  # it reads the files
        with tempfile.TemporaryDirectory() as profile:
            window = [f"--window-size={size[0]},{size[1]}", "--virtual-time-budget=20000"]
            place = [f"--user-data-dir={profile}", f"--screenshot={file}"]
            address += f"?forceSVG=true#{tab}"
            command = ["chromium", *QUIET, *place, *window, address]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    finally:
        server.terminate()
        server.wait()


def reduce(source: Path, target: Path, width: int) -> None:
    """A picture of at most ``width`` pixels and 64 colours."""
    with Image.open(source) as image:
        height = round(image.height * min(1.0, width / image.width))
        small = image.convert("RGB").resize((min(width, image.width), height), Image.LANCZOS)
    small.quantize(64, dither=Image.Dither.NONE).save(target, optimize=True)
    print(f"{target.relative_to(ROOT)} {target.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs/screenshots"))
    runs = parser.parse_args().runs
    if shutil.which("chromium") is None:
        sys.exit("chromium is not on PATH: apt-get install chromium")
    train(runs)
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, (logs, tab, size) in VIEWS.items():
            shot = Path(folder, f"{name}.png")
            shoot(runs / logs, tab, size, shot)
            reduce(shot, IMAGES / shot.name, width=1300)
    reduce(ROOT / runs / "demo" / "curves.png", IMAGES / "curves.png", width=800)


if __name__ == "__main__":
    main()
