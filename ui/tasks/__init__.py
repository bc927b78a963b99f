"""What the worker process does; these modules import torch."""
