//! The reason for it all: `psql` on one machine, PostgreSQL on another.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    process::Command,
};

use connect_tests::{
    PATIENCE,
    home::Pair,
    hub::Hub,
    postgres::{self, Postgres},
    process::Process,
};

/// The answer to a query, by `psql`.
fn psql(address: SocketAddr, query: &str) -> String {
    let mut command = Command::new(postgres::psql());
    command.args([
        "-X",
        "-q",
        "-A",
        "-t",
        "-v",
        "ON_ERROR_STOP=1",
        "-U",
        "postgres",
        "-d",
        "postgres",
    ]);
    command.args(["-h", &address.ip().to_string(), "-p", &address.port().to_string(), "-c", query]);
    let outcome = Process::spawn("psql", &mut command).outcome();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    outcome.stdout.trim_end().to_owned()
}

/// Sends a message of PostgreSQL's protocol, version 3.
fn send(tcp: &mut TcpStream, kind: Option<u8>, body: &[u8]) {
    let length = u32::try_from(body.len() + 4).expect("small").to_be_bytes();
    let message = [kind.as_slice(), &length, body].concat();
    tcp.write_all(&message).expect("the tunnel takes it");
}

/// Reads messages up to ReadyForQuery; all of them.
fn read_until_ready(tcp: &mut TcpStream) -> Vec<(u8, Vec<u8>)> {
    let mut messages = Vec::new();
    loop {
        let mut head = [0; 5];
        tcp.read_exact(&mut head).expect("a message");
        let [kind, length @ ..] = head;
        let mut body = vec![0; u32::from_be_bytes(length) as usize - 4];
        tcp.read_exact(&mut body).expect("its body");
        messages.push((kind, body));
        if kind == b'Z' {
            return messages;
        }
    }
}

#[test]
fn postgresql_is_queried_through_the_tunnel() {
    let database = Postgres::start();
    let pair = Pair::start(Hub::shared());
    let address = pair.carry(database.address(), "prod-db");

    // By hand, for machines without psql.
    let mut tcp = TcpStream::connect(address).expect("the local port is bound");
    tcp.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    let parameters = b"user\0postgres\0database\0postgres\0\0";
    send(&mut tcp, None, &[&196_608_u32.to_be_bytes(), parameters.as_slice()].concat());
    let greeting = read_until_ready(&mut tcp);
    assert_eq!(greeting[0], (b'R', vec![0; 4]), "AuthenticationOk");
    send(&mut tcp, Some(b'Q'), b"select 6 * 7\0");
    let answer = read_until_ready(&mut tcp);
    let row = answer.iter().find(|(kind, _)| *kind == b'D').expect("a row");
    assert!(row.1.ends_with(b"42"));
    send(&mut tcp, Some(b'X'), b"");
    let mut end = Vec::new();
    tcp.read_to_end(&mut end).expect("a clean end");
    assert!(end.is_empty());

    if postgres::psql().is_absolute() {
        psql(address, "create table orders (id int, note text)");
        psql(
            address,
            "insert into orders select n, repeat('x', n) from generate_series(1, 1000) n",
        );
        let sum = psql(address, "select count(*), sum(length(note)) from orders");
        assert_eq!(sum, "1000|500500");
        let all = psql(address, "select note from orders order by id");
        assert_eq!(all.len(), 500_500 + 999);
    }
}
