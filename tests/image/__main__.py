"""Builds the image's target `cpu` without a registry of images, runs it and says what is in it: `make image`.

python -m tests.image --base     makes the base anew, too
python -m tests.image --run      runs what was built before
"""

import argparse

from tests.image import build, run

MB = 1e6
MAX_MB = 1500


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.image", description=__doc__.partition("\n")[0])
    parser.add_argument("--base", action="store_true", help="make the base anew, too")
    parser.add_argument("--run", action="store_true", help="run what was built before")
    options = parser.parse_args()
    image = build.image_name() if options.run else build.build(options.base)
    steps = build.layers(image)
    for size, step in steps:
        print(f"{size / MB:7.0f} MB  {step[:100]}")
    total = sum(size for size, _ in steps) / MB
    print(f"{total:7.0f} MB  in all")
    for size, name in build.largest_packages(image):
        print(f"{size / MB:7.0f} MB  {name}")
    run.look(image)
    run.look(image, run.SERVE_RUN)
    assert total <= MAX_MB, f"the image has {total:.0f} MB, more than {MAX_MB}"


if __name__ == "__main__":
    main()
