"""Plain modules that know no mesh; kernels and caches are passed in."""
