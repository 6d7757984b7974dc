//! A PostgreSQL that is not the hub's own: over TCP, with TLS, passwords, and an owner without privileges.

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::Stdio,
};

use connect_hub::cluster::client_program;
use connect_spec::control::FromHub;
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, Uid, User},
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};

use crate::{
    client::{Control, Workspace},
    process::{HubProcess, run, stderr},
    template::place,
};

/// With each character that a URL must write in percents.
const OWNER_PASSWORD: &str = "o:w@n/e?r#%";
const OWNER_IN_URL: &str = "o%3Aw%40n%2Fe%3Fr%23%25";
const APP_PASSWORD: &str = "hunter2";

/// A server with a certificate for `localhost` by an authority of its own.
struct External {
    port: u16,
    ca: PathBuf,
    server: Child,
    _dir: TempDir,
}

impl External {
    async fn start(tls: bool) -> Self {
        let (dir, data_dir) = place().await;
        let pgdata = data_dir.join("postgres");
        let ca = dir.path().join("ca.pem");
        let (cert, key) = (pgdata.join("server.crt"), pgdata.join("server.key"));
        make_certificates(&ca, &cert, &key);
        fs::write(
            pgdata.join("pg_hba.conf"),
            "local all postgres trust\nhost all all 127.0.0.1/32 scram-sha-256\n",
        )
        .unwrap();
        // Free when asked, and nobody else of these tests takes it by number.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let version = fs::read_to_string(pgdata.join("PG_VERSION")).unwrap();
        let postgres = client_program("postgres", version.trim().parse().unwrap()).await.unwrap();
        let mut command = Command::new(postgres);
        command.arg("-D").arg(&pgdata).arg("-k").arg(&pgdata).current_dir(&pgdata);
        command.args(["-h", "127.0.0.1", "-F", "-p", &port.to_string()]);
        command.args(["-c", "password_encryption=scram-sha-256"]);
        command.args(["-c", if tls { "ssl=on" } else { "ssl=off" }]);
        if Uid::effective().is_root() {
            let user =
                ["postgres", "nobody"].into_iter().find_map(|name| User::from_name(name).unwrap());
            let user = user.unwrap();
            for path in [&cert, &key, &pgdata.join("pg_hba.conf")] {
                chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw())).unwrap();
            }
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        let mut server = command.stderr(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
        let mut log = BufReader::new(server.stderr.take().unwrap()).lines();
        loop {
            let line = log.next_line().await.unwrap().expect("the server ends before it is ready");
            if line.contains("ready to accept connections") {
                break;
            }
        }
        tokio::spawn(async move { while let Ok(Some(_)) = log.next_line().await {} });
        let external = Self { port, ca, server, _dir: dir };
        external
            .superuser(
                &pgdata,
                &format!(
                    "CREATE ROLE hub_owner LOGIN CREATEROLE PASSWORD '{OWNER_PASSWORD}'; CREATE DATABASE hub OWNER hub_owner"
                ),
            )
            .await;
        external
    }

    async fn superuser(&self, socket: &Path, sql: &str) {
        use sqlx::{
            Connection as _,
            postgres::{PgConnectOptions, PgConnection},
        };
        let options = PgConnectOptions::new_without_pgpass()
            .socket(socket)
            .port(self.port)
            .username("postgres")
            .database("postgres");
        let mut connection = PgConnection::connect_with(&options).await.unwrap();
        for statement in sql.split(';') {
            let statement = sqlx::AssertSqlSafe(statement.to_owned());
            sqlx::raw_sql(statement).execute(&mut connection).await.unwrap();
        }
    }

    /// A URL of a role with its password, as it is written into one.
    fn url(&self, role: &str, host: &str, parameters: &str) -> String {
        format!("postgres://{role}@{host}:{}/hub{parameters}", self.port)
    }

    fn owner(&self, parameters: &str) -> String {
        self.url(&format!("hub_owner:{OWNER_IN_URL}"), "localhost", parameters)
    }

    /// What makes the certificate trusted.
    fn root(&self) -> String {
        format!("?sslrootcert={}", self.ca.display())
    }

    async fn stop(mut self) {
        let pid = i32::try_from(self.server.id().unwrap()).unwrap();
        kill(Pid::from_raw(pid), Signal::SIGINT).unwrap();
        self.server.wait().await.unwrap();
    }
}

impl Drop for External {
    fn drop(&mut self) {
        if let Some(pid) = self.server.id().and_then(|pid| i32::try_from(pid).ok()) {
            // A test failed: at once, with its shared memory given back.
            let _ = kill(Pid::from_raw(pid), Signal::SIGQUIT);
        }
    }
}

fn make_certificates(ca_path: &Path, cert_path: &Path, key_path: &Path) {
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    // Of another name than the certificate below it, which would pass for one that signed itself.
    ca.distinguished_name.push(DnType::CommonName, "authority");
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_key = KeyPair::generate().unwrap();
    let ca_cert = ca.self_signed(&ca_key).unwrap();
    let issuer = Issuer::new(ca, ca_key);
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let leaf = leaf.signed_by(&key, &issuer).unwrap();
    fs::write(ca_path, ca_cert.pem()).unwrap();
    fs::set_permissions(ca_path, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(cert_path, leaf.pem()).unwrap();
    fs::write(key_path, key.serialize_pem()).unwrap();
    fs::set_permissions(key_path, fs::Permissions::from_mode(0o600)).unwrap();
}

/// Runs the program, which must fail and say so, and must not say the password.
async fn fails(args: &[&str], says: &[&str]) {
    let output = run(args).await;
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {text}");
    for part in says {
        assert!(text.contains(part), "{args:?}: {text}, expected {part}");
    }
    for secret in [OWNER_PASSWORD, OWNER_IN_URL, APP_PASSWORD, "wrong-word"] {
        assert!(!text.contains(secret), "{text}");
    }
}

async fn ok(args: &[&str]) -> String {
    let output = run(args).await;
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn a_database_with_tls_passwords_and_a_plain_owner_serves() {
    let database = External::start(true).await;
    let root = database.root();
    let owner = database.owner(&root);

    // TLS is verified although the URL says nothing of it.
    let silent = database.owner("");
    fails(&["migrate", "--database-url", &silent], &["whom this machine trusts", "sslrootcert="])
        .await;
    let other_name = owner.replace("localhost", "127.0.0.1");
    fails(&["migrate", "--database-url", &other_name], &["another name", "hint: "]).await;
    let no_file = database.owner("?sslrootcert=/nowhere.pem");
    fails(&["migrate", "--database-url", &no_file], &["database", "error: "]).await;
    // What else can be wrong is said in words.
    for (url, says) in [
        (database.url("hub_owner:wrong-word", "localhost", &root), "password"),
        (database.url("nobody:wrong-word", "localhost", &root), "password"),
        (owner.replace("/hub?", "/nothing?"), "no database of this name"),
        (owner.replace(&database.port.to_string(), "1"), "nothing listens there"),
        (owner.replace("localhost", "database.invalid"), "cannot be reached"),
    ] {
        fails(&["migrate", "--database-url", &url], &[says, "hint: "]).await;
    }

    ok(&["migrate", "--database-url", &owner]).await;
    ok(&["doctor", "--database-url", &owner]).await;
    let serve = |url: &str| {
        ["serve", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--database-url", url]
            .map(str::to_owned)
    };
    // The owner is bound by row security, too, and still not whom the hub serves as.
    let args = serve(&owner);
    fails(
        &args.each_ref().map(String::as_str),
        &["hub_owner", "connect_app", "connect-hub doctor"],
    )
    .await;

    // As README.md says: the owner gives connect_app a password.
    {
        use sqlx::Connection as _;
        let mut connection = sqlx::PgConnection::connect(&owner).await.unwrap();
        let sql = sqlx::AssertSqlSafe(format!("ALTER ROLE connect_app PASSWORD '{APP_PASSWORD}'"));
        sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
    }
    let app = database.url(&format!("connect_app:{APP_PASSWORD}"), "localhost", &root);
    assert!(ok(&["doctor", "--database-url", &app]).await.contains("as role connect_app"));
    let (_dir, data_dir) = crate::template::empty_place();
    let args = ["--listen", "127.0.0.1:0", "--database-url", &app];
    let hub = HubProcess::start_with(&data_dir, &args, |_| ()).await;
    let workspace = Workspace::new();
    let founder = workspace.founder();
    Control::log_in(hub.agents, &workspace, &founder).await;

    // A backup goes the same way: TLS, and the password not on the command line.
    let files = tempfile::tempdir().unwrap();
    let file = files.path().join("hub.backup");
    let file = file.to_str().unwrap();
    assert!(ok(&["backup", file, "--database-url", &owner]).await.contains("agents 1\n"));
    fails(&["backup", file, "--database-url", &app], &["connect_backup", "owner"]).await;
    fails(&["restore", file, "--replace", "--database-url", &owner], &["stop the hub"]).await;
    let log = hub.stop().await;
    assert!(!log.contains(APP_PASSWORD), "the log has the password");
    ok(&["restore", file, "--replace", "--database-url", &owner]).await;
    ok(&["doctor", "--database-url", &app]).await;
    let hub = HubProcess::start_with(&data_dir, &args, |_| ()).await;
    let mut control = Control::connect(hub.agents).await;
    assert!(matches!(control.try_log_in(&founder, |_| ()).await, FromHub::Welcome { .. }));

    // The server goes away under the hub and comes to nothing; the hub stays.
    let admin = hub.admin;
    database.stop().await;
    while crate::operation::status(admin, "/readyz").await == 200 {}
    hub.stop().await;
}

#[tokio::test]
async fn a_database_without_tls_must_be_asked_for() {
    let database = External::start(false).await;
    fails(&["migrate", "--database-url", &database.owner("")], &["no TLS", "sslmode=disable"])
        .await;
    ok(&["migrate", "--database-url", &database.owner("?sslmode=disable")]).await;
    database.stop().await;
}
