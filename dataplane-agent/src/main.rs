//! The `dataplane` binary.
fn main() -> anyhow::Result<()> {
    dataplane_agent::cli::load::run(std::path::Path::new("/sys/fs/bpf"))
}
