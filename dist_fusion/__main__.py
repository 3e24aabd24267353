"""`dist-fusion …` and `python -m dist_fusion …`: `status` answers at once, all other commands load torch first.

`doctor` speaks even where that fails.
"""

import sys


def main() -> int:
    """Run one command; returns the exit code."""
    if sys.argv[1:2] == ["status"]:
        from dist_fusion import status

        return status.main(sys.argv[2:])
    if sys.argv[1:2] == ["doctor"]:
        from dist_fusion import doctor

        return doctor.main(sys.argv[2:])
    from dist_fusion import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
