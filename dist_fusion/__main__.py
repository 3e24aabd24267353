"""`dist-fusion …` and `python -m dist_fusion …`; `doctor` speaks even where nothing else can be loaded."""

import sys


def main() -> int:
    """Run one command; returns the exit code."""
    if sys.argv[1:2] == ["doctor"]:
        from dist_fusion import doctor

        return doctor.main(sys.argv[2:])
    from dist_fusion import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
