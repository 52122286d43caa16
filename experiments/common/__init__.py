"""What the experiments share: where they ran, time and memory, the judgement, weights, peers, a roofline."""
