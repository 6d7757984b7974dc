//! The public API against everything that must not work.

#[path = "../common/mod.rs"]
mod common;

mod custody;
mod invite;
mod keys;
mod log;
mod sealed;
mod trust;
