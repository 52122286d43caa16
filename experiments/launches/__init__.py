"""What do the compiled encoders ask of a GPU: launches, bytes and a roofline's time, read off the generated code."""
