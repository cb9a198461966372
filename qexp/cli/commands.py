"""The programs beside the experiments: the first word of a command line -> the module whose `main` it runs."""

COMMANDS = {
    "report": "qexp.report.__main__",
    "clean": "qexp.clean",
    "doctor": "qexp.doctor.__main__",
    "fit": "qexp.fit.__main__",
    "predict": "qexp.predict.__main__",
    "rerun": "qexp.rerun",
}
