//! Where settings come from, and what the log shows at the level that operators run with.

use std::fs;

use connect_spec::{
    control::{ErrorCode, FromHub, Nonce, Request},
    encoding::Encoding,
    ids::ServiceId,
};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_tungstenite::tungstenite::{Message, http::StatusCode};

use crate::{
    client::{Dialer, error_code},
    process::{HubProcess, hub_command, stderr},
    template::{empty_place, place},
    tunnels::{SERVICE, TAG, World, dial, open},
};

#[tokio::test]
async fn options_win_over_the_environment_and_that_over_the_file() {
    let (dir, _) = empty_place();
    let path = dir.path().join("hub.toml");
    let text = "listen = \"127.0.0.1:1\"\nadmin_listen = \"127.0.0.1:2\"\ndrain = \"1s\"\n\
                data_dir = \"/srv/hub\"\ntrusted_proxy = \"10.0.0.0/8\"\n";
    fs::write(&path, text).unwrap();
    let output = hub_command()
        .env("CONNECT_HUB_CONFIG", &path)
        .env("CONNECT_HUB_LISTEN", "127.0.0.1:3")
        .env("CONNECT_HUB_ADMIN_LISTEN", "127.0.0.1:4")
        .env("CONNECT_HUB_TRUSTED_PROXY", "10.0.0.1,10.0.0.2")
        .args(["config", "--listen", "127.0.0.1:5"])
        .output()
        .await
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let shown = String::from_utf8(output.stdout).unwrap();
    for line in [
        "listen = \"127.0.0.1:5\" # an option",
        "admin_listen = \"127.0.0.1:4\" # the environment, CONNECT_HUB_ADMIN_LISTEN",
        "trusted_proxy = [\"10.0.0.1\", \"10.0.0.2\"] # the environment, CONNECT_HUB_TRUSTED_PROXY",
        "drain = \"1s\" # the file, line 3",
        "registration = \"open\" # default",
    ] {
        assert!(shown.lines().any(|shown| shown == line), "{line}\n{shown}");
    }

    fs::write(&path, "listen = \"127.0.0.1:1\"\nlisten_too = \"x\"\n").unwrap();
    let output = hub_command().args(["serve", "--config"]).arg(&path).output().await.unwrap();
    assert_eq!(output.status.code(), Some(2));
    let told = stderr(&output);
    assert!(told.contains(&format!("`{}`, line 2, `listen_too`", path.display())), "{told}");
    assert!(told.contains("hint: there are log, "), "{told}");
}

/// A session with tunnels and failures; gives what may not be in the log.
async fn live(world: &mut World) -> Vec<String> {
    let canary = "canary-0b5ecafe";
    let (mut reacher, mut exposer) = world.tunnel(Encoding::Binary).await;
    reacher.send(Message::binary(canary.as_bytes().to_vec())).await.unwrap();
    assert_eq!(exposer.next().await.unwrap().unwrap().len(), canary.len());
    drop((reacher, exposer));
    let (ticket, _) = world.tickets(Encoding::Binary).await;
    let binary = Encoding::Binary.subprotocol();
    dial(&world.dialer, Some(&ticket), Encoding::Base64.subprotocol()).await.err().unwrap();
    dial(&world.dialer, Some(&ticket), binary).await.err().unwrap();
    let unknown = open(99, ServiceId([1; 16]), world.exposer.id);
    assert_eq!(world.reaching.refused(Request::OpenTunnel(unknown)).await, ErrorCode::NotFound);

    let mut wrong = world.dialer.control().await;
    let refusal = wrong.try_log_in(&world.exposer, |login| login.authority = canary.to_owned());
    assert_eq!(error_code(refusal.await), ErrorCode::WrongAuthority);
    let mut wrong = world.dialer.control().await;
    wrong.nonce = Nonce([0; 32]);
    let refusal = wrong.try_log_in(&world.exposer, |_| ()).await;
    assert_eq!(error_code(refusal), ErrorCode::Unauthorized);
    let mut stranger = world.dialer.control().await;
    let refusal = stranger.redeem(&world.workspace, &world.workspace.invite(1, None)).await;
    assert_eq!(error_code(refusal), ErrorCode::InviteUnknown);
    let mut garbage = world.dialer.control().await;
    garbage.socket.send(Message::text(canary)).await.unwrap();
    assert!(matches!(garbage.receive().await, FromHub::Error(_)));

    for request in [
        format!("GET /{canary} HTTP/1.1\r\nhost: {canary}\r\nuser-agent: {canary}\r\n\r\n"),
        format!("GET /v1/tunnel HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {canary}\r\n\r\n"),
        format!("{canary}\r\n\r\n"),
    ] {
        let mut stream = TcpStream::connect(world.hub.agents).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
    }
    // A home that was copied: the one warning about an agent.
    let mut copy = world.exposer.clone();
    copy.static_key = [9; 32];
    let refusal = world.dialer.control().await.try_log_in(&copy, |_| ()).await;
    assert_eq!(error_code(refusal), ErrorCode::Clone);
    vec![canary.to_owned(), ticket.reveal().to_owned(), TAG.to_string(), SERVICE.to_string()]
}

#[tokio::test]
async fn the_log_of_an_operator_names_no_client_and_holds_no_secret() {
    let (_dir, data_dir) = place().await;
    for format in ["text", "json"] {
        let listen = ["--listen", "127.0.0.1:0", "--trusted-proxy", "127.0.0.1"];
        let args = [&listen[..], &["--log", "info", "--log-format", format]].concat();
        let hub = HubProcess::start_with(&data_dir, &args, |_| ()).await;
        let client = "203.0.113.77";
        let dialer = Dialer { forwarded_for: Some(client.to_owned()), ..Dialer::plain(hub.agents) };
        let mut world = World::populate(hub, dialer, None).await;
        let mut secrets = live(&mut world).await;
        secrets.push("203.0.113".to_owned());
        // Many tries, until the address is barred.
        let binary = Encoding::Binary.subprotocol();
        while dial(&world.dialer, None, binary).await.err() != Some(StatusCode::TOO_MANY_REQUESTS) {
        }
        let log = world.hub.stop().await;
        assert!(log.contains("clone"), "it logs nothing: {log}");
        for secret in secrets {
            assert!(!log.contains(&secret), "`{secret}` is in the log:\n{log}");
        }
        if format == "json" {
            for line in log.lines() {
                let line: serde_json::Value = serde_json::from_str(line).unwrap();
                assert!(line["level"].is_string() && line["timestamp"].is_string(), "{line}");
            }
        }
    }
    // The last words of a hub that cannot start, too.
    let output = hub_command()
        .args(["--log-format", "json", "serve", "--listen", "127.0.0.1:0"])
        .args(["--admin-listen", "127.0.0.1:0", "--data-dir", "/proc/nowhere"])
        .output()
        .await
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let told = stderr(&output);
    let last: serde_json::Value = serde_json::from_str(told.lines().last().unwrap()).unwrap();
    assert!(last["message"].as_str().unwrap().contains("/proc/nowhere"), "{last}");
}
