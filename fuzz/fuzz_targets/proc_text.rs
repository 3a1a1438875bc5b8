#![cfg_attr(fuzzing, no_main)]

pagemerge_fuzz::target!(pagemerge_fuzz::proc_text::run);
