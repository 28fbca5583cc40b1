"""Saved models, metrics and the sample: folders of the checkout that setup.py maps here."""
