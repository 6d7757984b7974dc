//! The audit log as people read it, and API keys as programs use them.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    process::Command,
};

use connect_tests::{
    home::{Home, Pair, Workspace},
    hub::Hub,
    postgres,
    services::Service,
};
use serde_json::Value;

/// What the owner of the hub's database does to it.
fn edit(hub: &Hub, sql: &str) {
    let mut psql = Command::new(postgres::psql());
    let socket = hub.data_dir().join("socket");
    psql.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", "connect", "-c", sql]);
    let output = psql.arg("-h").arg(socket).output().expect("psql runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The rows that `connect audit --json` prints.
fn rows(home: &Home, options: &[&str]) -> Vec<Value> {
    let args = [&["audit", "--json"], options].concat();
    home.ok(&args).lines().map(|line| serde_json::from_str(line).expect("JSON lines")).collect()
}

/// Sends bytes through a tunnel and back.
fn exchange(address: std::net::SocketAddr) {
    let mut client = TcpStream::connect(address).expect("a local port");
    client.write_all(b"hello").expect("sent");
    let mut answer = [0; 5];
    client.read_exact(&mut answer).expect("answered");
    assert_eq!(&answer, b"hello");
}

#[test]
fn log_is_read_with_names_and_an_edit_is_found() {
    let hub = Hub::start(&[]);
    let mut pair = Pair::start(&hub);
    let echo = Service::echo();
    exchange(pair.carry(echo.address(), "ledger"));
    pair.reacher.ok(&["down"]);
    assert!(pair.reacher_agent.wait(std::time::Duration::from_secs(20)).is_some());

    let founder = pair.exposer();
    let closed = loop {
        let rows = rows(founder, &[]);
        if let Some(row) = rows.iter().find(|row| row["kind"] == "tunnel_closed") {
            break row.clone();
        }
    };
    assert_eq!(closed["service"], "ledger");
    assert_eq!(closed["agent"], "reacher");
    assert!(closed["bytes_from_agent"].as_u64() > Some(5), "{closed}");
    let text = founder.ok(&["audit"]);
    for part in ["workspace_created", "agent=reacher", "service=ledger", "reason="] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    assert!(rows(founder, &["--since", "1h"]).len() == text.lines().count());
    // In the hub's own text there is no name.
    edit(
        &hub,
        "DO $$ BEGIN ASSERT NOT EXISTS (SELECT FROM connect.audit_events WHERE event LIKE '%ledger%'); END $$",
    );

    let verdict = founder.json(&["audit", "verify"]);
    let last = verdict["head"]["seq"].as_u64().expect("a number");
    assert_eq!(verdict["rows"], last);
    assert!(founder.ok(&["audit", "verify"]).contains("rows hold"));

    // Changed, put back, removed, and written anew with a chain that holds.
    let change = |from: &str, to: &str| {
        edit(
            &hub,
            &format!(
                "UPDATE connect.audit_events SET event = replace(event, '{from}', '{to}') WHERE seq = 2"
            ),
        );
    };
    change("\"role\":\"member\"", "\"role\":\"exposer\"");
    founder.fails(&["audit", "verify"], 7, "row 2 was changed");
    founder.fails(&["audit"], 7, "row 2 was changed");
    change("\"role\":\"exposer\"", "\"role\":\"member\"");
    founder.ok(&["audit", "verify"]);
    edit(
        &hub,
        "BEGIN;
         CREATE TABLE public.kept AS SELECT * FROM connect.audit_events WHERE seq = 3;
         DELETE FROM connect.audit_events WHERE seq = 3; COMMIT",
    );
    founder.fails(&["audit", "verify"], 7, "row 3 is missing");
    edit(
        &hub,
        "INSERT INTO connect.audit_events (workspace_id, seq, hash, event)
         SELECT workspace_id, seq, hash, event FROM public.kept",
    );
    founder.ok(&["audit", "verify"]);
    edit(
        &hub,
        "DO $$
         DECLARE r record; previous bytea := decode(repeat('00', 32), 'hex');
         BEGIN
             UPDATE connect.audit_events SET event = replace(event, '\"role\":\"member\"', '\"role\":\"exposer\"') WHERE seq = 2;
             FOR r IN SELECT * FROM connect.audit_events ORDER BY seq LOOP
                 previous := connect.audit_link(r.workspace_id, previous, r.seq, r.event);
                 UPDATE connect.audit_events SET hash = previous WHERE seq = r.seq;
             END LOOP;
             UPDATE connect.audit_heads SET hash = previous;
         END $$",
    );
    // At the first place after it that this agent remembers.
    let seen = fs::read(founder.dir().join("trust/audit.json")).expect("it looked before");
    let seen: Vec<Value> = serde_json::from_slice(&seen).expect("JSON");
    let first = seen.iter().filter_map(|seen| seen["seq"].as_u64()).find(|seq| *seq >= 2);
    let first = first.expect("it saw the end of the log");
    let expected = format!("row {first}, or one before it, is not what this agent saw before");
    founder.fails(&["audit", "verify"], 7, &expected);
    // The reacher looked at the log with its beats, as every member does, and never by hand.
    pair.reacher.fails(&["audit", "verify"], 7, "is not what this agent saw before");
}

#[test]
fn young_rows_that_were_removed_under_a_pretext_are_missed() {
    let hub = Hub::start(&[]);
    let workspace = Workspace::found(&hub);
    let founder = &workspace.founder;
    founder.ok(&["audit", "verify"]);
    founder.ok(&["invite"]);
    founder.ok(&["audit", "verify"]);
    // What the owner writes holds in itself, and says what a hub says that removes what is too old.
    edit(
        &hub,
        "DO $$
         DECLARE head connect.audit_heads%ROWTYPE; expired text; link bytea;
         BEGIN
             SELECT * INTO STRICT head FROM connect.audit_heads;
             DELETE FROM connect.audit_events;
             expired := format('{\"at\":%s,\"kind\":\"audit_expired\",\"through\":%s}',
                 floor(extract(epoch FROM now()) * 1000), head.seq);
             link := connect.audit_link(head.workspace_id, head.hash, head.seq + 1, expired);
             INSERT INTO connect.audit_events (workspace_id, seq, hash, event)
             VALUES (head.workspace_id, head.seq + 1, link, expired);
             UPDATE connect.audit_heads h SET seq = head.seq + 1, hash = link,
                 base_seq = head.seq, base_hash = head.hash;
         END $$",
    );
    founder.fails(&["audit", "verify"], 7, "were removed, and not for their age");
    founder.fails(&["audit"], 7, "were removed, and not for their age");
    // Whoever never saw the log before has nothing to hold it against.
    assert!(workspace.join("late").json(&["audit", "verify"])["expired"].as_u64() > Some(2));
}

#[test]
fn rows_are_followed_as_they_come() {
    let hub = Hub::start(&[]);
    let pair = Pair::start(&hub);
    let mut command = pair.exposer().command(&["audit", "--follow"]);
    let following = connect_tests::process::Process::spawn("audit --follow", &mut command);
    following.stdout_line(|line| line.contains("workspace_created").then_some(()));
    let echo = Service::echo();
    pair.carry(echo.address(), "later");
    following.stdout_line(|line| line.contains("service_exposed").then_some(()));
    following.stdout_line(|line| line.contains("tunnel_opened").then_some(()));
}

/// Asks the hub as a program would.
fn get(hub: &Hub, path: &str, key: &str) -> (u16, Value) {
    let mut socket = TcpStream::connect(hub.address()).expect("a hub");
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: hub\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n\r\n"
    );
    socket.write_all(request.as_bytes()).expect("sent");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("answered");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    (status, serde_json::from_str(body).expect("JSON"))
}

#[test]
fn api_key_reads_ids_and_sealed_records_until_it_is_revoked() {
    let hub = Hub::start(&[]);
    let pair = Pair::start(&hub);
    let echo = Service::echo();
    let address = pair.carry(echo.address(), "canary-service");
    exchange(address);
    let founder = pair.exposer();
    let key = founder.ok(&["api-key", "create", "--scope", "read", "--scope", "audit"]);
    let created = founder.json(&["api-key", "create", "--expires", "12h"]);
    assert!(key.starts_with("pck_") && key.len() == 68, "{key}");
    assert_eq!(created["key"].as_str().map(str::len), Some(68));

    let services = founder.json(&["services"]);
    let (status, listed) = get(&hub, "/v1/services", &key);
    assert_eq!(status, 200);
    assert_eq!(listed["items"][0]["service_id"], services[0]["service_id"]);
    assert!(!listed.to_string().contains("canary"));
    assert_eq!(get(&hub, "/v1/agents", &key).1["items"].as_array().map(Vec::len), Some(2));
    assert_eq!(get(&hub, "/v1/tunnels", &key).1["items"].as_array().map(Vec::len), Some(1));
    assert_eq!(
        get(&hub, "/v1/audit?kind=api_key_created", &key).1["items"].as_array().map(Vec::len),
        Some(2)
    );

    let keys = pair.reacher.json(&["api-key", "list"]);
    assert_eq!(keys.as_array().map(Vec::len), Some(2));
    assert_eq!(keys[0]["scopes"], serde_json::json!(["read", "audit"]));
    assert!(keys[0]["last_used_at"].is_u64() && keys[1].get("last_used_at").is_none());
    assert!(!keys.to_string().contains("pck_"));
    assert!(pair.reacher.ok(&["api-key", "list"]).contains("read,audit"));
    let id = keys[0]["key_id"].as_str().expect("an id");
    pair.reacher.ok(&["api-key", "revoke", id]);
    assert_eq!(get(&hub, "/v1/services", &key).0, 401);
    pair.reacher.fails(&["api-key", "revoke", id], 5, "no such API key");
    founder.fails(&["api-key", "create", "--expires", "400d"], 2, "366 days");
    founder.fails(&["api-key", "revoke", "x"], 2, "");
    // The key itself is nowhere at the hub.
    assert!(!hub.log().contains(&key[4..]));
}
