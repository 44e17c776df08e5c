//! Generates the messages, the async client and the async server trait from agent.proto.
//! Pure Rust: no protoc is needed.

use std::path::PathBuf;
use std::{env, fs, io};

use ttrpc_codegen::{Codegen, Customize};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=agent.proto");
    let out = PathBuf::from(
        env::var_os("OUT_DIR").ok_or_else(|| io::Error::other("OUT_DIR is not set"))?,
    );
    Codegen::new()
        .out_dir(&out)
        .input("agent.proto")
        .include(".")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            ..Customize::default()
        })
        .run()?;
    // The generator permits itself unsafe code without using any; the crate forbids it.
    let service = out.join("agent_ttrpc.rs");
    let text = fs::read_to_string(&service)?;
    fs::write(&service, text.replace("#![allow(unsafe_code)]", ""))?;
    // The two files begin with inner attributes, so they must be modules rather than included.
    fs::write(
        out.join("generated.rs"),
        "pub mod agent;\npub mod agent_ttrpc;\n",
    )
}
