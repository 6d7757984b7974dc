//! The hub.
pub mod cluster;
pub mod limits;
pub mod relay;
pub mod store;
