"""What the experiments share: their command line, encoders, peers, comparisons, measurements and a roofline model."""
