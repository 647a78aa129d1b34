from se_inject.cli.entry import main

main()
