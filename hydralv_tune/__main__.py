"""Run the command line as `python -m hydralv_tune`."""

from hydralv_tune.cli.main import main

if __name__ == "__main__":
    main()
