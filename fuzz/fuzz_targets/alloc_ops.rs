#![cfg_attr(fuzzing, no_main)]

pagemerge_fuzz::target!(pagemerge_fuzz::alloc_ops::run);
