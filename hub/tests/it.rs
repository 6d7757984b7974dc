//! The program as its users meet it: real processes, real sockets, a real PostgreSQL, and a client that
//! shares nothing with the agent but the wire types.

#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "a test stops at the first surprise"
)]

#[path = "it/client.rs"]
mod client;
#[path = "it/process.rs"]
mod process;
#[path = "it/template.rs"]
mod template;

#[path = "it/audit.rs"]
mod audit;
#[path = "it/backup.rs"]
mod backup;
#[path = "it/catalog.rs"]
mod catalog;
#[path = "it/deploy.rs"]
mod deploy;
#[path = "it/external.rs"]
mod external;
#[path = "it/isolation.rs"]
mod isolation;
#[path = "it/migrations.rs"]
mod migrations;
#[path = "it/operation.rs"]
mod operation;
#[path = "it/psql.rs"]
mod psql;
#[path = "it/rest.rs"]
mod rest;
#[path = "it/revocation.rs"]
mod revocation;
#[path = "it/sessions.rs"]
mod sessions;
#[path = "it/settings.rs"]
mod settings;
#[path = "it/statements.rs"]
mod statements;
#[path = "it/strangers.rs"]
mod strangers;
#[path = "it/trust.rs"]
mod trust;
#[path = "it/tunnels.rs"]
mod tunnels;
