//! The `retro-export` command as a user calls it, on real exports (tests/data/zoo.tar.xz) in temporary folders.

mod bad_input;
mod folders;
mod host;
mod hostile;
mod interrupted;
mod output;
mod proof;
mod shared;
mod support;
mod zoo;
