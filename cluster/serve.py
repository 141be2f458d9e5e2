"""`python -m cluster.serve FILE`: cluster.foreground's, which Ctrl-C ends from the first moment on."""

import signal

if __name__ == "__main__":
    # Imports take seconds, and some of them swallow a KeyboardInterrupt.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from cluster.foreground import main

    main()
