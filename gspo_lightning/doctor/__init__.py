"""Would this run start well, and where did a faulty step go wrong?"""
