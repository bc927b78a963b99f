"""The tasks of the worker process; these modules import torch."""
