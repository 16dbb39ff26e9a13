"""So that `python -m dsgnn.teacher` trains a teacher."""

from dsgnn.teacher.cli import main

main(prog_name="python -m dsgnn.teacher")
