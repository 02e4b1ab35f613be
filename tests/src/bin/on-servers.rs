//! Runs a command once on each of the servers that the tests run on: `on-servers COMMAND ..`. It finds the server's URL
//! in `DATABASE_URL`.

use std::env;
use std::process::{Command, ExitCode};

use dlock_tests::servers;

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    let Some((program, arguments)) = arguments.split_first() else {
        eprintln!("usage: on-servers COMMAND ..");
        return ExitCode::FAILURE;
    };
    for server in servers() {
        println!("\n{}:", server.name);
        let status = Command::new(program)
            .args(arguments)
            .env("DATABASE_URL", &server.url)
            .status();
        match status {
            Ok(status) if status.success() => {}
            Ok(status) => {
                eprintln!("{program:?}: {status}");
                return ExitCode::FAILURE;
            }
            Err(error) => {
                eprintln!("cannot start {program:?}: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
