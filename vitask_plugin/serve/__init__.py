"""`vitask serve`: a page on this machine that shows what a tuned model says of an image, and what that rests on."""
