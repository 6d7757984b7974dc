//! The promise itself: what passes through the hub is nowhere to be read there.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
};

use connect_tests::{
    PATIENCE, eventually,
    home::{Home, Workspace},
    hostile_relay::HostileRelay,
    hub::Hub,
    random, random_word,
    search::{Search, family},
    services::Service,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[test]
fn hub_and_wire_hold_no_plain_text() {
    let hub = Hub::start(&[]);
    let wire = HostileRelay::honest(&hub);
    let workspace = Workspace::found_at(&wire.url());
    let exposer = &workspace.founder;

    let name = format!("name-{}", random_word());
    let label = format!("label-{}", random_word());
    let asked = format!("ask-{}", random_word());
    let answered = format!("answer-{}", random_word());
    // A target that nothing else here can be mistaken for.
    let bytes = random(2);
    let target: SocketAddr =
        format!("127.77.{}.{}:0", bytes[0], bytes[1] | 1).parse().expect("one");
    let answer = format!("{answered} ").repeat(2000);
    let service = {
        let answer = answer.clone();
        Service::start_on(target, move |mut tcp| {
            let answer = answer.clone();
            async move {
                let mut question = Vec::new();
                // A probe asks nothing.
                if tcp.read_to_end(&mut question).await.is_ok() && !question.is_empty() {
                    tcp.write_all(answer.as_bytes()).await.expect("the exposer takes it");
                    // Stays open, so that the search finds a hub at work.
                    std::future::pending::<()>().await;
                }
            }
        })
    };
    let target = service.address().to_string();

    let reacher = workspace.join(&label);
    let exposer_agent = exposer.up();
    let _reacher_agent = reacher.up();
    exposer.ok(&["expose", &target, "--name", &name]);
    let mut client = TcpStream::connect(reacher.reach(&name)).expect("the local port is bound");
    client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    client.write_all(format!("{asked} ").repeat(2000).as_bytes()).expect("the tunnel takes it");
    client.shutdown(Shutdown::Write).expect("our own socket");
    let mut read = vec![0; answer.len()];
    client.read_exact(&mut read).expect("the answer");
    assert!(read == answer.as_bytes());
    assert_eq!(reacher.json(&["services"])[0]["name"], name.as_str());

    // What the trust log and a new epoch bring through the hub is as opaque.
    let left = format!("left-{}", random_word());
    let later = format!("later-{}", random_word());
    let leaver = workspace.join(&left);
    exposer.ok(&["revoke", &left, "--yes"]);
    leaver.fails(&["services"], 6, "revoked");
    exposer.ok(&["expose", &target, "--name", &later]);
    reacher.reach(&later);
    let shared = format!("shared-{}", random_word());
    let given = exposer.json(&["share", &later, "--name", &shared]);
    let guest = Home::new();
    let visitor = format!("guest-{}", random_word());
    guest.ok(&["join", given["code"].as_str().expect("a code"), "--label", &visitor]);
    eventually("the guest sees the service", || guest.ok(&["services"]).contains(&later));

    let host = target.split(':').next().expect("a host").to_owned();
    let secrets = [&name, &label, &asked, &answered, &host, &left, &later, &shared, &visitor]
        .map(String::as_bytes);
    let search = Search::new(secrets);
    // Every place is searched for something that must be there, too: else it was not searched.
    let agent = exposer.json(&["status"])["agent_id"].as_str().expect("an id").to_owned();
    let raw = hex::decode(&agent).expect("hex");
    let control = Search::new([agent.as_bytes(), &raw]);

    assert_eq!(search.bytes(&wire.recorded()), [""; 0], "wire");
    assert_ne!(control.bytes(&wire.recorded()), [""; 0], "wire");

    let (mut known, mut total) = (Vec::new(), 0);
    let mut databases = 0;
    for id in family(hub.id()) {
        let name = std::fs::read_to_string(format!("/proc/{id}/comm")).unwrap_or_default();
        databases += usize::from(name.trim() == "postgres");
        // The first of PostgreSQL's processes shares its memory with the others.
        match search.memory(id, databases < 2) {
            Ok((hits, bytes)) => {
                assert_eq!(hits, [""; 0], "memory");
                total += bytes;
                known.extend(control.memory(id, false).map(|(hits, _)| hits).unwrap_or_default());
            }
            // Only a process that has ended may be left out.
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{error}"),
        }
    }
    assert_ne!(known, [""; 0], "{total} bytes of memory");
    assert!(databases > 1, "PostgreSQL was looked into, too");
    let (hits, _) = search.memory(exposer_agent.id(), true).expect("our own child");
    assert!(
        hits.iter().any(|hit| hit.starts_with(&host)),
        "the exposer knows its target: {hits:?}"
    );

    // The log is complete, and the database written, when the hub is stopped.
    let mut hub = hub;
    let (hits, _) = search.dir(hub.data_dir());
    assert_eq!(hits, [""; 0], "database of a hub at work");
    let log = hub.log();
    hub.stop();
    assert_eq!(search.bytes(log.as_bytes()), [""; 0], "log");
    assert_ne!(control.bytes(log.as_bytes()), [""; 0], "log");
    let (hits, total) = search.dir(hub.data_dir());
    assert_eq!(hits, [""; 0], "database");
    assert_ne!(control.dir(hub.data_dir()).0, [""; 0], "{total} bytes of database");
}
