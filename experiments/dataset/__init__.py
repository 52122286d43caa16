"""How fast is a whole collection of images embedded, by one process or with Ray Data?"""
