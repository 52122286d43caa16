"""What can a GPU tell about this project, in one folder and under 8 minutes?"""
