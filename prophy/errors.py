"""The one exception that means: the user can mend this."""


class ProPhyError(Exception):
    """A mistake in what the user gave: input, configuration, folder.

    Its message is one sentence that says what is wrong, with which value, and what to do. The command line
    prints it without a traceback and exits with code 2; the endpoint answers it as a 4xx.
    """
