"""A network that predicts where people look, to give training photos their ranks and shares."""
