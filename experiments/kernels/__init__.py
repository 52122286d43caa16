"""What did the compiler make of each kernel, how much work does it do, and how fast is it?"""
