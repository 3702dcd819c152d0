"""Accuracies on CIFAR-10, in percent, that the tables set beside our own."""

DEPTHS = (20, 32, 44, 56, 110)

# He et al. 2015, "Deep Residual Learning for Image Recognition", arXiv:1512.03385, table 6, as
# accuracy. For 110 layers the best of five runs, as in Fig. 6 of the report; all five together
# are 93.39 +- 0.16.
HE2015 = {20: 91.25, 32: 92.49, 44: 92.83, 56: 93.03, 110: 93.57}

# The report (Gelda et al. 2016), Fig. 9; its column ResNet is also "Our results" of Fig. 6.
REPORT = {
    "plain": {20: 90.61, 32: 88.22, 44: 87.49, 56: 85.81, 110: 9.98},
    "resnet": {20: 91.53, 32: 92.66, 44: 92.20, 56: 92.30, 110: 93.59},
    "resresnet": {20: 90.05, 32: 88.32, 44: 88.82, 56: 86.03, 110: 90.89},
    # The report, III.B: 32 layers, initialised by training one block after the other.
    "top_down": {32: 89.82},
    "bottom_up": {32: 92.15},
}
