//! `retro-run`: the command.

fn main() {}
