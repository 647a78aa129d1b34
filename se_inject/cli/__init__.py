from se_inject.cli.entry import main as main
