"""The calibrated start of a ResNet: channels that are chosen, and convolutions that are solved for them."""
