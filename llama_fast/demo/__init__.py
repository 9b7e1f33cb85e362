"""The bundled demo model: `PATH` is its folder, train.py the script that made it, README.md what it is."""

from pathlib import Path

PATH = Path(__file__).parent
