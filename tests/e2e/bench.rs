//! `connect-bench` measures what it says. How fast anything is, no test says.

use std::process::Command;

use connect_tests::{
    PATIENCE,
    process::{Process, program},
};
use serde_json::Value;

#[test]
fn every_figure_is_measured_and_no_byte_is_another() {
    let programs = program("connect");
    let mut measured = Process::spawn(
        "connect-bench",
        Command::new(env!("CARGO_BIN_EXE_connect-bench"))
            .args(["--quick", "--rounds", "1", "--json"])
            .env("CONNECT_BIN_DIR", programs.parent().expect("it is in a directory")),
    );
    // Everything is measured for a moment, but much is measured.
    measured.wait(4 * PATIENCE);
    let measured = measured.outcome();
    assert_eq!(measured.code, Some(0), "{}", measured.stderr);
    let report: Value = serde_json::from_str(&measured.stdout).expect("JSON");
    assert_eq!(report["corrupt"], 0);
    let figures = report["figures"].as_array().expect("a list");
    assert!(figures.len() > 20, "{report}");
    for figure in figures {
        let name = figure["figure"].as_str().expect("a name");
        let of_the_programs = name.starts_with("cpu_") || name.starts_with("memory_");
        assert_eq!(figure["direct"].is_null(), of_the_programs, "{figure}");
        for way in ["direct", "base64", "binary"] {
            let Some(value) = figure[way]["median"].as_f64() else {
                assert!(way == "direct" && of_the_programs, "{figure}");
                continue;
            };
            // In so short a time a process may use less CPU or memory than the system counts, and a
            // round trip be over before anything comes beside it.
            assert!(value > 0.0 || of_the_programs || name == "loaded_bulk", "{figure}");
        }
    }
}
