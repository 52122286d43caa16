"""What can a GPU tell about this project, in one command that may be killed at any time?"""
