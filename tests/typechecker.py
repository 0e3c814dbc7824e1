"""How annotations are checked while tests run: by beartype, for which an int is a float here, as PEP 484 has it."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
