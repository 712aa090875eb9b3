"""Questions of two hops: where the bridge is, whose circuits they use, whether the first hop is taken."""
