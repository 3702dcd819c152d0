"""What computes: backends behind ``resnet.functions``, all of the form of ``reference``."""
