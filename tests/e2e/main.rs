//! End to end: real processes, real sockets, a real PostgreSQL. One module for each feature.
//!
//! `make test` builds the programs and runs this.

mod audit;
mod bench;
mod carry;
mod certificates;
mod check;
mod daemon;
mod database;
mod doctor;
mod enrol;
mod full_disk;
mod garbage;
mod hostile;
mod hostile_hub;
mod hub_sees;
mod isolation;
mod network;
mod passphrase;
mod ports;
mod reconnect;
mod rekey;
mod resume;
mod rotate;
mod said;
mod secrets;
mod shape;
mod shares;
mod terminal;
mod tidy;
mod tls;
mod trust;
mod verify;
mod words;
